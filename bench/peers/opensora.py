"""The official code in the same run as ours: model, sampler, VAE and training, on the same weights.

Run: python -m vidtta.bench.peers.opensora [--out FILE.json] [--only NAME ...] [--minutes M]      (needs a GPU)
     python -m vidtta.bench.peers.opensora --check      (CPU: a small network in float32)

Both must compute the same: the official result may lie at most a tolerance (opensora_rows.py) from our plain path's, relative in the
L2 norm; a row beyond has no time. The first row of a kind is the official one; `ratio` is how many times longer it took than the row. Where
opensora (branch opensora/v1.3) cannot be imported, the one row says why.
"""

from .. import record, suite
from ..suite import Absent


def main() -> None:
    arguments = suite.parser("peers.opensora", __doc__, minutes=6.0).parse_args()
    from .official import load
    from .opensora_rows import ROWS, Pair

    names = suite.chosen(list(ROWS), arguments.only)
    if arguments.list:
        print("\n".join(names))
        return
    device = suite.device(arguments.check)
    about = record.environment(device, arguments.commit)

    def write(rows: list[suite.Row]) -> None:
        if arguments.out:
            record.write(arguments.out, "peers", about, rows)

    try:
        official = load(device)
    except Absent as error:
        rows: list[suite.Row] = [{"row": "opensora", "absent": str(error)}]
        print(suite.line(rows[0]), flush=True)
        write(rows)
        return
    from ..step_rows import attention
    from ..step_scene import real_scene, small_scene

    scene = small_scene(device) if arguments.check else real_scene(device)
    attention(scene)  # which of the back ends our fast path takes
    suite.finish(suite.run(ROWS, names, Pair(official, scene), arguments.minutes * 60, write))


if __name__ == "__main__":
    main()
