"""The plain data that the rest of the house speaks: specs, requests, rows, plans, results, messages."""
