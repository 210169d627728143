import pickle
import subprocess
import sys

from megatron_flowrl.config import UserError


def test_config_needs_neither_torch_nor_megatron():
    check = (
        "import sys, megatron_flowrl.config as config; config.load_config(None);"
        "heavy = {'torch', 'megatron', 'numpy', 'transformers'} & set(sys.modules);"
        "rooms = {m for m in sys.modules if m.startswith('megatron_flowrl.')"
        " and not m.startswith('megatron_flowrl.config')};"
        "sys.exit(str(heavy | rooms) if heavy | rooms else 0)"
    )
    result = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_user_error_survives_a_process_boundary():
    error = pickle.loads(pickle.dumps(UserError("a", "b")))
    assert error.problems == ("a", "b") and str(error) == "2 problems:\n- a\n- b"
    assert str(UserError("a")) == "a"
