"""What several test files share."""
import signal

import pytest

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs begin with Ctrl-C ignored, and so would their children


@pytest.fixture(scope="module")
def one_thread():
    "PyTorch in one thread: models this small only lose by sharing, and sums keep their order."
    torch = pytest.importorskip("torch")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
