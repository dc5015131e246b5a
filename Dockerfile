# One image for every role: `perdure engine`, `perdure worker`, `perdure server`. A worker that runs your own tasks adds
# them: FROM this image, then `pip install` what they need.
FROM python:3.13-slim

# What outlives a container: stores and slots under /state, checkpoints, large values and snapshots, and the keys
# that engines and workers share.
RUN useradd --uid 1000 --no-create-home perdure \
    && install --directory --owner=perdure --mode=0700 /state /checkpoints /blobs /keys

WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY perdure ./perdure
COPY schemas ./schemas
COPY streams ./streams
COPY projections ./projections
COPY connectors ./connectors
RUN pip install --no-cache-dir . && rm -rf /source/*

ENV PERDURE_STATE_DIR=/state \
    PERDURE_CHECKPOINT_DIR=/checkpoints \
    PERDURE_KEYS_FILE=/keys/keys.json \
    PYTHONUNBUFFERED=1
USER perdure
WORKDIR /state
ENTRYPOINT ["perdure"]
CMD ["--help"]
