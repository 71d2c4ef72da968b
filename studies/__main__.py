"""Command line of the studies: ``python -m studies``."""

from gradreg_optax.experiments.cli import Command, Program, main

PROGRAM = Program(
    "python -m studies",
    "studies",
    "Studies beyond the paper, on the same trainer as gradreg. Each one writes a table, figures and"
    " results.json, and resumes when it is started again.",
    {
        "frontier": Command(
            "Accuracy against cost for lazy penalties.",
            "7 minutes on two cores",
            "--optimizers sgd --report-seeds 5 --choose-seeds 5",
        ),
        "strength": Command(
            "Relative strength, fixed or self-tuned, compared with a searched gamma on eight"
            " tasks.",
            "24 minutes on two cores",
            '--tasks "digits, 30 % label noise" --seeds 3',
        ),
        "late": Command(
            "Early, late, lazy and partial penalties at the same cost.",
            "8 minutes on two cores",
            "--datasets digits --shares 4",
        ),
        "flatness": Command(
            "Calibration, quantization, input noise and forgetting for the methods of gradreg"
            " compare.",
            "2 minutes on two cores",
            "--datasets digits --seeds 5",
        ),
        "language": Command(
            "Penalties in single-epoch training of a byte-level language model.",
            "60 minutes on two cores",
            "--seeds 2 --choose-seeds 1 --steps 200",
        ),
        "unseen": Command(
            "The self-tuned strength on registered tasks that had no part in its choice.",
            "20 minutes on two cores",
            "--tasks diabetes --seeds 3",
        ),
        "full-size": Command(
            "All of Fashion-MNIST with augmentation, weight decay, batch norm and a cosine.",
            "45 minutes on one core",
            "--seeds 2 --noises 0.2",
        ),
        "fine-tuning": Command(
            "Fine-tuning on few labels, with all layers and with LoRA.",
            "10 minutes on one core",
            "--labels 10 --seeds 2",
        ),
    },
)

if __name__ == "__main__":
    main(PROGRAM)
