"""Items of few packed rows on fp8 pages, by products of warps."""
