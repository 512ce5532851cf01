"""`moce bench orders` reads every image of an epoch in each order; how fast depends on the machine."""

from moce_ds.bench.orders import bench_orders


def test_a_cache_asks_the_storage_for_blocks_only() -> None:
    random, blocks, cached = bench_orders(256, 0.0, 1)
    assert [row["name"] for row in (random, blocks, cached)] == ["random", "blocks", "blocks, cache"]
    assert random["answers"] == blocks["answers"] == 256
    assert 2 <= cached["answers"] <= 256 + 2 and random["ratio"] == 1
    assert all(row["images_per_second"] > 0 for row in (random, blocks, cached))
