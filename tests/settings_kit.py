"""Settings of a run that nothing is wrong with, and that is not there yet."""

BASE = {
    "model_name_or_path": "s",
    "teacher_model_name_or_path": "t",
    "task": "dag",
    "output_dir": "no-such-folder/run",
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
}
