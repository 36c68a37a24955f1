"""`--recipe`: other defaults of the flags than the paper's. A flag that is given wins.

The paper's own numbers are the defaults in `options`. From Python: `Options(**Options.preset("modern"), datadir=…)`.
"""

from typing import Any

RECIPES: dict[str, dict[str, Any]] = {
    "paper": {},
    "modern": {
        # SegFormer's own training scales by half to twice and crops; the crop then moves the image, not a shift.
        "scale": (0.5, 2.0),
        "shift": 0,
        "jitter": 0.3,
        # The ImageNet weights were trained with it.
        "normalisation": "auto",
        # A quarter-size label loses thin objects, and mIoU is scored at full size elsewhere.
        "loss_size": "full",
        # The published schedule ends at a third of its learning rate, at two thirds where it ends after 500 epochs;
        # the last small steps are worth much.
        "schedule": "step",
        # AdamW's moments are empty at first.
        "warmup_steps": 100,
        # Decay pulls a normalisation's scale away from where it does nothing, and holds back no weight by it.
        "decay": "matrices",
        # The average of the last steps is worth about as much as a lower learning rate.
        "ema": 0.999,
        # The teacher's class probabilities say more than a label, and cost only its decode head.
        "logits_weight": 1.0,
        # Steps, not epochs, decide what is learned.
        "keep_steps": True,
    },
}
