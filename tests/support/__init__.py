"""What several tests use: stand-ins at the outermost borders, golden cases, folders."""
