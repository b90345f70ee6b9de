"""Pages of KV memory, their leases, and the prefix tree of committed blocks; no tensor is touched here."""
