"""What the trainer reads: columns, checks, and the plain and privileged views of a prompt."""
