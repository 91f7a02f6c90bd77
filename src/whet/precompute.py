"""Annotations of rows that need computing only once: kept on disk by the content of rows and model."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from whet.annotate import Annotation
from whet.backends.protocol import Backend, shares_prefixes
from whet.batch import collate
from whet.columns import column
from whet.data import cache
from whet.data.prepared import Prepared
from whet.errors import DataError
from whet.log import progress_over

logger = logging.getLogger(__name__)

UNITS_PER_BATCH = 64


def computed_once(
    rows: Prepared, stage: Annotation, model: Backend, *, role: str, key: str, root: Path, max_gb: float
) -> Prepared:
    """`rows` with the columns that `stage` writes, computed now or read from `root`.

    `model` takes the stage's `role`; `key` says everything that the columns follow from beside the rows and the
    stage: the model's content, temperature and arithmetic. What was not used for longest makes room in `root`, which
    holds at most `max_gb` gigabytes. Raises DataError where nothing can be kept.
    """
    parts = [rows.fingerprint, rows.selection.tolist(), repr(stage), key]
    name = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
    folder = root / f"annotated-{name}"
    found = cache.load(folder)
    if found is None:
        draft = cache.draft_beside(folder)
        try:
            cache.store(folder, _compute(rows, stage, model, role, draft), {})
            found = cache.load(folder)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
        cache.trim(root, max_gb, keep=folder)
        assert found is not None, f"{folder} was written and cannot be read"
    else:
        logger.info("%s of the %s rows are read from %s", ", ".join(sorted(stage.writes)), rows.what, folder)
    return rows.with_columns(**found[0])


def _compute(rows: Prepared, stage: Annotation, model: Backend, role: str, draft: Path) -> dict[str, np.ndarray]:
    """The columns beside the tokens of all rows, on disk while they grow."""
    kept: dict[str, np.ndarray] = {}
    for units in progress_over(_batches(rows), f"{role} on the {rows.what} rows", -(-len(rows) // UNITS_PER_BATCH)):
        batch = stage(collate([rows[i] for i in units], share_prefixes=shares_prefixes(model)), {role: model}, {})
        places = np.concatenate([np.arange(span.start, span.stop) for i in units for span in rows.spans(i)])
        for name in stage.writes:
            values = batch[name].cpu().numpy()
            if name not in kept:
                shape = (len(rows.arrays.tokens), *values.shape[1:])
                dtype = np.dtype(column(name).dtype)
                kept[name] = _on_disk(draft / f"{name}.npy", dtype, shape)
            kept[name][places] = values
    return kept


def _on_disk(path: Path, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    """An array mapped from a new file. Its space is taken at once: writing to a page for which the disk has none
    would kill the process."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        array = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
        if hasattr(os, "posix_fallocate"):
            with path.open("r+b") as file:
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    except OSError as error:
        raise DataError(
            f"{path.stem} of the rows cannot be kept in {path.parent.parent}: {error.strerror}; set data.cache_dir to "
            "a folder with space, or compute it in every step (leave out reference.precompute, distill.top_k)"
        ) from error
    return array


def _batches(rows: Prepared) -> Iterator[list[int]]:
    """Units of like length together, so that no batch is mostly padding where a model needs padded rows."""
    order = np.argsort(-rows.lengths, kind="stable").tolist()
    for start in range(0, len(order), UNITS_PER_BATCH):
        yield order[start : start + UNITS_PER_BATCH]
