"""What a worker process answers: here, to a job that it cannot begin."""

from __future__ import annotations

import io
import json
from pathlib import Path

import torch

from mue.lab.data import Corpus
from mue.lab.runners.jobs import Jobs
from support.small_run import moe_run


def answer(job: dict[str, object]) -> dict[str, str]:
    out = io.StringIO()
    Jobs(out, set()).begin(job)
    (line,) = out.getvalue().splitlines()
    message: dict[str, str] = json.loads(line)
    return message


def test_a_name_that_only_the_sender_knows_is_refused_with_the_way_to_make_it_known(
    tmp_path: Path, corpus: Corpus
) -> None:
    run = moe_run(corpus)
    job = {"id": run.key, "run": run.to_dict(), "store": str(tmp_path), "checkpoint_seconds": 1, "stack": 1}
    job |= {"compiled": False, "threads": torch.get_num_threads()}
    for ours, theirs in (('"router": "sigmoid"', '"router": "theirs"'), ('"rule": "complete-mue"', '"rule": "theirs"')):
        text = json.dumps(job)
        assert ours in text
        message = answer(json.loads(text.replace(ours, theirs)))
        assert message["kind"] == "user" and "'theirs'" in message["error"], message
        assert "entry point group 'mue.plugins'" in message["error"]
    message = answer({**job, "run": {**run.to_dict(), "settings": {"schedule": "none"}}})  # a mistake of another kind
    assert message["kind"] == "user" and "mue.plugins" not in message["error"]
