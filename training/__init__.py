"""The loop of both trainings, and what each of them does in a step."""
