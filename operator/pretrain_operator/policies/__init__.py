"""Pure decisions, one question per module; :mod:`plan` strings them together."""
