"""`app` for uvicorn: `uvicorn tesp_api.tesp_api:app`. The only module whose import builds something."""

from __future__ import annotations

import sys

from tesp_api import logs
from tesp_api.app import create_app, settle
from tesp_api.errors import TespError
from tesp_api.settings import load, prepare_data_dir

try:
    _settings = load()
    logs.configure(_settings.logging.level, as_json=_settings.logging.output_json)
    prepare_data_dir(_settings)
    app = create_app(_settings)
    settle()
except TespError as _error:  # one line, not a traceback, for what the operator must mend
    sys.exit(f"tesp-api cannot start: {_error}")
