"""A few damaged files for every reader, and all that make test-fuzz ever found."""

import pytest
from hypothesis import HealthCheck, given, settings

from tests.fuzz import FOUND, READERS, answer, files_for


@pytest.mark.parametrize("reader", READERS)
def test_reader_answers_damaged_files(reader, tmp_path):
    @settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(files_for(reader))
    def read_all(data):
        assert answer(reader, data, tmp_path) is None

    read_all()


@pytest.mark.parametrize("reader", READERS)
def test_reader_reads_the_sound_file(reader, tmp_path):
    name, sound, read = READERS[reader]
    assert answer(reader, sound, tmp_path) is None
    assert read(tmp_path / reader / name)


def test_what_fuzzing_found_stays_mended(tmp_path):
    files = sorted(FOUND.iterdir()) if FOUND.is_dir() else []
    answers = {path.name: answer(path.name.partition(".")[0], path.read_bytes(), tmp_path) for path in files}
    assert not {name: what for name, what in answers.items() if what}
