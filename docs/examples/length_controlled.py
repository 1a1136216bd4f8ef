"""Win rates as if both answers were equally long."""

from arcore.zoo.alignment.length_controlled import LengthControlled, synthetic

for verbosity in (0.5, 2.0):
    rows = synthetic(verbosity)
    found = LengthControlled().fit(
        rows["preference"], rows["length"], rows["baseline_length"]
    )
    print(
        f"answers {verbosity} times as long: win rate {found.raw_:.1f} %, "
        f"length-controlled {found.win_rate_:.1f} %"
    )
