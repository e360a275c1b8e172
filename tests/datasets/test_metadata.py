"""What is known of the public data sets."""

import pytest

from avjax.datasets import registry
from avjax.datasets.metadata import corpus, metadata, target


@pytest.mark.parametrize("name", [n for n in registry.REGISTRY if n not in ("demo", "folder")])
def test_every_public_data_set_says_where_it_comes_from(name):
    known = metadata(name)
    assert known.title
    assert known.citation
    assert known.licence
    assert known.homepage.startswith("http")
    assert known.clips > 0
    counts = list(known.classes.values())
    assert None in counts or sum(counts) == known.clips
    assert not known.parts or sum(known.parts.values()) == known.clips


def test_targets_share_what_is_of_the_corpus():
    assert (corpus("mafw:compound"), target("mafw:compound"), target("mafw")) == ("mafw", "compound", "")
    single, compound = metadata("mafw"), metadata("mafw:compound")
    assert single.citation == compound.citation
    assert (len(single.classes), len(compound.classes), single.clips, compound.clips) == (11, 43, 9172, 8996)
    assert metadata("folder") is None
