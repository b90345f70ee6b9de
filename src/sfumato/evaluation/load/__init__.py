"""A server under load: requests that arrive by a law, how long each took, what that says of the server."""
