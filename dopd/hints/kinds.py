"""Kinds of hints."""

WRITTEN = ("steps", "steps-with-execution", "summary", "boxes", "caption")  # a model writes them
FOUND = ("answer", "other-problem")  # nobody has to
KINDS = (*WRITTEN[:3], "answer", *WRITTEN[3:], "other-problem")
WITHOUT_RESULTS = ("steps", "summary", "boxes", "caption", "other-problem")  # no step is carried out in them
