"""What operator, trainer and command line agree on: schemas, names, arithmetic."""
