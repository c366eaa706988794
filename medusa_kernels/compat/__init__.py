"""Other projects' interfaces on this package's operators."""
