"""S2-LoRA is as good as AdaLoRA in its domain with far fewer parameters, and better out of it.

    python benchmarks/claims/s2_lora.py

Out of the domain: the test set as a speech recogniser would have it, all lower case without punctuation and with one word in
eight lost or doubled, in place of a new group of speakers; nothing of the kind is trained on.
"""

import json
import random

from _common import FOLDER, LIMITS, about, above, accuracies, few_shot, percent, spread, values

from tunesmith import data
from tunesmith.bench.claims import claim
from tunesmith.lifecycle import evaluate_run

SIDES = {"s2-lora": {"method": "s2-lora", "rank": 32}, "adalora": {"method": "adalora", "rank": 12, "target_rank": 8}, "lora": {"method": "lora", "rank": 8}}
PAPER = "S2-LoRA (arXiv 2309.09443)"
