"""What a student can do without privileged information: accuracies with intervals, lengths, entropy, divergence."""
