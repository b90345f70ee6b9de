"""The HTTP front door, the command line, and what people see of them."""
