"""Who scores answers: verifiers by name, of this package and of users."""
