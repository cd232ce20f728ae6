"""From a YAML file to an adapter folder, for both kinds: what the command line runs."""
