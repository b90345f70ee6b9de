"""Train the tiny models that ship with the package; nothing in `src/` imports from here."""
