"""Every limit of the models, with its unit and its reason."""

MIB = 1024 * 1024

# A model's name is a folder's name, so no separators, no leading dot, and short enough for any file system.
NAME_PATTERN = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
# A model file is read whole into memory before it is parsed.
MODEL_BYTES_MAX = 1024 * MIB
MANIFEST_BYTES_MAX = 4 * MIB
# Models that one server keeps loaded; the one that was not used for longest goes first.
LOADED_MODELS_MAX = 16
# Rows of one call, so that one caller cannot hold a server for minutes.
ROWS_MAX = 1_000_000
# A server predicts up to so many values (rows x features) on its loop's thread, which saves a switch of threads; more
# than that could hold up other messages for longer than some milliseconds.
INLINE_VALUES_MAX = 20_000
# Rows with more values than this travel as binary; for fewer a .npy header costs more than JSON.
NPY_VALUES_MIN = 512
# Joined calls: rows of one batch, the seconds that it should take, and batches that one server has at one time (one is
# computed, one waits for it).
BATCH_ROWS_MAX = 1_024
BATCH_S_MAX = 0.05
BATCHES_PER_SERVER = 2
# Calls that wait for a server; beyond it, or beyond this predicted wait, they end as `Overloaded`.
QUEUED_CALLS_MAX = 10_000
QUEUE_S_MAX = 2.0
# A call whose server was lost is given to another so often; an input that ends each server it meets must not end all.
ATTEMPTS_MAX = 3
# Trainings that wait at one server, behind the one that runs.
TRAININGS_QUEUED_MAX = 64
# Finished jobs that are remembered, for callers that come back.
FINISHED_JOBS_MAX = 1_000
# Callbacks that are told of one training's progress; the newest count.
WATCHERS_MAX = 16
# A progress report a training at most so often, so that a fast one does not flood its caller.
PROGRESS_S = 0.05

# Supervision. The back-off doubles with each process in a row that crashes before it has said hello.
CRASHES_MAX = 5
CRASH_WINDOW_S = 60.0
BACKOFF_S_MIN = 0.05
BACKOFF_S_MAX = 5.0
STDERR_LINES = 20
STDERR_LINE_BYTES_MAX = 2_000
# Our servers are asked every PING_S whether they serve; silent for SILENT_S they get nothing more, for HUNG_S they are
# killed. A started server that says nothing for START_S is killed too.
PING_S = 0.5
SILENT_S = 2.0
HUNG_S = 30.0
START_S = 60.0
# The next program that is not our server is started when the one before has said hello, or after this.
STAGGER_S = 5.0
# A stop waits so long after QUIT before it kills, and a server so long before it says HELLO to a manager again.
STOP_S = 5.0
HELLO_S = 60.0
# Deadlines of calls that name none.
CALL_TIMEOUT_S = 30.0
TRAIN_TIMEOUT_S = 86_400.0
# Parts of an error's text; some libraries put whole arrays into theirs.
ERROR_CHARS_MAX = 2_000
