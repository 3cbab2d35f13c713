# What is there, and what would a run make of it?
dopd data problems.jsonl --held-out test.jsonl
# Keep each problem once, and those that have an answer
dopd data problems.jsonl --columns '{prompt: question, solution: solution}' --keep '{distinct: true, filled: [answer]}' --output rows.jsonl
# The worst hints: the answers themselves. All of them leak
dopd hints write rows.jsonl --kind answer --output answers.jsonl
dopd hints audit answers.jsonl
# Better ones: what to work out, in order, and no result
dopd hints write rows.jsonl --kind steps --writer ./rule.py:hint --output hints.jsonl
# Does the teacher answer better with them? Rows where it answers worse are dropped
dopd hints check hints.jsonl --teacher tiny:dag/teacher_needs_p --verifier ./judge.py:score --min-gain 0 --output good.jsonl
# What do they give away?
dopd hints audit good.jsonl --max-leaks 0.01 --html audit.html
# The control: hints of other problems
dopd hints write good.jsonl --kind other-problem --output control.jsonl
# Held-out problems, with their own hints
dopd hints write test.jsonl --columns '{prompt: question}' --kind steps --writer ./rule.py:hint --output held-out.jsonl
# Train the student twice: with its hints, and with those of other problems
dopd train hints.yaml --dataset_name good.jsonl --output_dir runs/hints
dopd train hints.yaml --dataset_name control.jsonl --output_dir runs/control
# Before and after, without p and with it, prompt by prompt
dopd eval tiny:dag/student runs/hints runs/control --dataset-name held-out.jsonl --verifier ./judge.py:score --max-new-tokens 25 --output evaluation
dopd report runs/hints runs/control --output report.html
