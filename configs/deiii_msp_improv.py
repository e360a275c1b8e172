"""DE-III on MSP-IMPROV: valence, arousal and dominance by concordance correlation, five folds of disjoint actors.

Command:   python -m avjax.train --config configs/deiii_msp_improv.py --config.data.root=MSP-IMPROV
Data:      MSP-IMPROV as it was downloaded (session1/S01A/P/MSP-IMPROV-….avi, Evalution.txt; signed agreement): 8,385
           clips of 12 actors. Ratings of 1 to 5 become 0 to 1, arousal turned round, since it is stored flipped. Not
           shipped.
Paper:     CCC V 89.3, A 88.7, D 85.8 (Table 1).
Measured:  no; the data set was not available. A planted relation is recovered:
           tests/commands/test_regression.py.
Variants:  sessions: the six sessions, each with its pair of actors left out in turn; others as in
           `configs/deiii_crema_d.py`.
"""

from ml_collections import ConfigDict

from avjax.config import module, with_variants

CREMA_D = module("configs/deiii_crema_d.py")


def base() -> ConfigDict:
    config = CREMA_D.base()
    config.name, config.dataset = "deiii_msp_improv", "msp_improv"
    config.protocol.update(folds="speaker")
    return config


def get_config(variants: str = "") -> ConfigDict:
    return with_variants(base(), variants, CREMA_D.TABLE | {"sessions": {"protocol.folds": "given"}})
