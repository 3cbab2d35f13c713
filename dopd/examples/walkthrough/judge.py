# judge.py
def score(completion, row):
    return float(completion.split()[-1:] == [row["answer"]])
