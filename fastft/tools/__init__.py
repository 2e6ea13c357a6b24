"""What the command line runs, each callable from Python as well."""
