"""What adapters of both kinds share."""
