"""Which order of the samples finds wrong labels best: by weight, or by alignment, and on which scale?"""

from __future__ import annotations

import argparse
from statistics import mean, stdev

import torch
from torch import Tensor

from examples.slgrad import label_flips, noisy_pairs, toy_regression
from examples.slgrad.study import Step, Study, auroc, batches
from mtlweight import MultiTaskOptimizer, SampleWeights, SLGrad

MNIST = next(study for study in label_flips.STUDIES if study.name == "label_flips_mnist")
SETUPS = (
    (noisy_pairs.STUDY, "main shifted", 0.003),
    (noisy_pairs.STUDY, "main symmetric", 0.003),
    (MNIST, "uniform", 0.003),
    (MNIST, "background", 0.003),
    (toy_regression.STUDY, "constant 60%", 0.01),
)
"""Study, set-up and learning rate."""


def compare(study: Study, setup: str, rate: float, seed: int, steps: int) -> dict[str, float]:
    """Areas under the ROC curve of finding the main task's wrong labels after one training, by order."""
    data = study.load(setup, seed)
    torch.manual_seed(seed)
    model = study.network()
    optimizer = MultiTaskOptimizer(
        study.optimizer(model.parameters(), lr=rate), SLGrad("main", scope="main"), shared=model.encoder, model=model
    )
    held_out = batches(torch.ones(len(data.held_out), dtype=torch.bool), steps, study.held_out_batch)
    record = SampleWeights()
    sums, counts = torch.zeros(2, len(data.train), dtype=torch.float64)
    for k, chosen in enumerate(batches(data.train.labelled[0], steps, study.batch)):
        step = Step(study, model, data.train[chosen], data.held_out[next(held_out)], k / steps)
        optimizer.zero_grad()
        optimizer.combine(step.per_sample, reference=step.reference).backward()
        optimizer.step()
        record.add(optimizer.report, chosen)
        sums[chosen] += optimizer.report.alignment[0]
        counts[chosen] += 1
    corrupted = data.train.corrupted[0]
    table = record.table("main")
    index = torch.tensor([row["index"] for row in table])

    def found(values: Tensor) -> float:
        return auroc(values[corrupted[index]], values[~corrupted[index]])

    return {
        "weight": record.auroc(corrupted, "main", by="weight"),
        "mean alignment": found((sums / counts)[index]),
        "mean relative alignment": found(torch.tensor([row["alignment"] for row in table])),
        "share of times opposed, then mean relative alignment": record.auroc(corrupted, "main"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="few steps of the last set-up: to see that it runs")
    options = parser.parse_args()
    torch.set_num_threads(1)
    columns = {}
    for study, setup, rate in SETUPS[-1:] if options.quick else SETUPS:
        steps = 20 if options.quick else study.steps
        columns[setup] = [compare(study, setup, rate, seed, steps) for seed in range(options.seeds)]
    print(f"| AUROC of the order by | {' | '.join(columns)} |")
    print(f"| --- |{' ---: |' * len(columns)}")
    for order in next(iter(columns.values()))[0]:
        values = [[run[order] for run in runs] for runs in columns.values()]
        cells = [f"{mean(row):.3f}" + (f" ± {stdev(row):.3f}" if len(row) > 1 else "") for row in values]
        print(f"| {order} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
