"""The subcommands of `sfumato`, one file each."""
