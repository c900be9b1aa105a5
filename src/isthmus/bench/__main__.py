"""`python -m isthmus.bench`: the same as `isthmus bench`."""

from isthmus.bench.cli import bench_group

if __name__ == "__main__":
    bench_group(prog_name="isthmus bench")
