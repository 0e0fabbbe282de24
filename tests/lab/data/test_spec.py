from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mue.lab.data import Corpus, ImageSet
from mue.lab.data.spec import data_source, describe_data, open_corpus, open_data
from support.pictures import pictures


def test_a_source_of_images_is_opened_again_from_what_a_run_keeps(tmp_path: Path) -> None:
    pictures(tmp_path / "photos")
    for table in ({"source": "digits"}, {"source": "photos", "size": 8, "odd": "crop", "validation_fraction": 0.5}):
        source = data_source({"data": table}, tmp_path, ImageSet.kind)
        found = open_data(source)
        assert isinstance(found, ImageSet)
        kept = describe_data(source, found)
        assert kept["kind"] == "images" and open_data(kept["source"]).hash == kept["hash"]
        assert str(tmp_path) not in str(found.describe())
        with pytest.raises(ValueError, match="the data are images, and this reads text"):
            open_corpus(source)


def test_what_a_run_keeps_of_text_is_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some text " * 20)
    source = data_source({"data": {"source": "a.txt"}}, tmp_path)
    assert source == {"source": [str(tmp_path / "a.txt")], "cache": str(tmp_path / "runs/data")}
    assert isinstance(open_data(source), Corpus)


@pytest.mark.parametrize(
    ("table", "reads", "says"),
    [
        ({}, "images", 'source = "digits" or source = "photos/"'),
        (
            {"source": "digits"},
            "text",
            'source = "digits" is images, and the task reads text: take another .run. task, or source = "stdlib"',
        ),
        ({"source": "stdlib"}, "images", 'source = "stdlib" is text, and the task reads images'),
        ({"source": "a", "tokenizer": "t.json"}, "images", "tokenizer is for text, and the task reads images"),
        ({"source": "a", "odd": "crop"}, "text", "odd is for images, and the task reads text"),
        ({"source": "a", "szie": 4}, "images", "did you mean 'size'"),
        ({"size": 4}, "images", "needs source"),
        ({"source": 3}, "images", "must be a path, a list of paths"),
    ],
)
def test_a_table_of_the_wrong_kind(table: dict[str, Any], reads: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=says):
        data_source({"data": table}, tmp_path, reads)
