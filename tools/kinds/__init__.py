"""What tools/fuzz.py damages, a module a kind: how a case is made, and what is right."""
