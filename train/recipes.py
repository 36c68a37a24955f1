"""`--recipe`: other defaults of the flags than the paper's. A flag that is given wins.

The paper's own numbers are the defaults in `options`. From Python: `Options(**Options.preset("modern"), datadir=…)`.

docs/RESULTS.md has what each part brings, and why jitter, averaged weights, a warm-up and a learning rate that falls to
zero are flags but no part of it.
"""

from typing import Any

RECIPES: dict[str, dict[str, Any]] = {
    "paper": {},
    "modern": {
        # SegFormer's own training scales by half to twice and crops; the crop then moves the image, not a shift. It
        # helps where images are seen hundreds of times, as in the paper's 1000 epochs, and costs where they are not.
        "scale": (0.5, 2.0),
        "shift": 0,
        # The ImageNet weights were trained with it.
        "normalisation": "auto",
        # A quarter-size label loses thin objects, and mIoU is scored at full size elsewhere.
        "loss_size": "full",
        # Decay pulls a normalisation's scale away from where it does nothing, and holds back no weight by it.
        "decay": "matrices",
        # The teacher's class probabilities say more than a label, and cost only its decode head.
        "logits_weight": 1.0,
        # Steps, not epochs, decide what is learned.
        "keep_steps": True,
    },
}
