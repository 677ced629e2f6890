"""What operator, trainer and command line agree on: schemas, names and arithmetic. Pydantic only."""
