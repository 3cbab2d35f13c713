# rule.py
def hint(row):
    """The names that the solution works out, in order: the plan, without the results."""
    return " ".join(["plan", *(word for word in row["solution"].split() if word.isupper())])
