"""Metadata of the public data sets."""

import pytest

from avjax.datasets import registry
from avjax.datasets.metadata import corpus, metadata, target


@pytest.mark.parametrize("name", [n for n in registry.REGISTRY if n not in ("demo", "folder")])
def test_every_public_data_set_says_where_it_comes_from(name):
    facts = metadata(name)
    assert facts.title
    assert facts.citation
    assert facts.licence
    assert facts.homepage.startswith("http")
    assert facts.clips > 0
    counts = list(facts.classes.values())
    assert None in counts or sum(counts) == facts.clips
    assert not facts.parts or sum(facts.parts.values()) == facts.clips


def test_targets_share_what_is_of_the_corpus():
    assert (corpus("mafw:compound"), target("mafw:compound"), target("mafw")) == ("mafw", "compound", "")
    single, compound = metadata("mafw"), metadata("mafw:compound")
    assert single.citation == compound.citation
    assert (len(single.classes), len(compound.classes), single.clips, compound.clips) == (11, 43, 9172, 8996)
    assert metadata("folder") is None
