"""Run the tests whose results could differ between machines, under settings that stand for other machines.

Prints one line per setting, followed by the tests that failed. Two settings run in parallel, except those that need
both cores.
"""

import argparse
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

TESTS = Path(__file__).parent.parent

# Test files (without `test_` and `.py`) whose results depend on arithmetic.
NUMERIC = (
    "ast audio_augmentation audio_classifier audio_data backbone bert callbacks causal_lm clip "
    "conditional_decoder contrastive_distributed contrastive_image_text contrastive_losses ctc_alignment "
    "ctc_beams decoders drawing encoder_decoder evaluate evaluate_audio evaluate_translation exact_resume "
    "excluded_tokens generate_command generation gpt image_classifier log_mel losses low_precision_seq2seq "
    "masked_lm masks networks old_checkpoints optim own_task parity parity_ast parity_bert parity_gpt "
    "parity_seq2seq parity_vit parity_whisper predict predict_text probe_callback question_answering reduction "
    "relative_bias retrieval retrieval_report scaled_adamw search seq2seq shared_context shared_trunk "
    "sound_reports sounds spectrograms speech_callback speech_data speech_encoder speech_recognizer "
    "speech_to_text squad_scores text_callbacks text_classifier text_commands text_head throughput "
    "token_classifier transcribe transcribe_decoder translate translation_callback warm_start whisper"
)
RUNS = "resume"  # slow: all of its tests run only beside the busy loops
FEW = f"not peak_memory and (not test_{RUNS} or classify or (equal_losses and (image or pairs)))"
# Test files that could differ on a busy machine.
TIMED = (RUNS, "checkpoints", "token_shards", "tar_shards", "samplers", "memory", "benchmark")

SETTINGS: dict[str, dict[str, str]] = {
    "ATEN_CPU_CAPABILITY=default": {"ATEN_CPU_CAPABILITY": "default"},
    "ATEN_CPU_CAPABILITY=avx2": {"ATEN_CPU_CAPABILITY": "avx2"},
    "ATEN_CPU_CAPABILITY=avx512": {"ATEN_CPU_CAPABILITY": "avx512"},
    "ONEDNN_MAX_CPU_ISA=AVX2": {"ONEDNN_MAX_CPU_ISA": "AVX2"},
    "bfloat16 orthogonalisation on": {"TRUNKLINE_TEST_BFLOAT16": "on"},
    "bfloat16 orthogonalisation off": {"TRUNKLINE_TEST_BFLOAT16": "off"},
    "1 thread": {"TRUNKLINE_TEST_THREADS": "1", "OMP_NUM_THREADS": "1"},
    "2 threads": {"TRUNKLINE_TEST_THREADS": "2", "OMP_NUM_THREADS": "2"},
    "random order": {"TRUNKLINE_TEST_ORDER": "1"},
}
ALONE = "2 threads"  # beside another setting its threads would wait for each other
BUSY = "beside two busy loops"


def file_of(name: str) -> str:
    """The path of the test file `test_NAME.py`."""
    (found,) = TESTS.rglob(f"test_{name}.py")
    return str(found)


def run(setting: str, environ: dict[str, str], names: list[str], *options: str) -> bool:
    """Run these test files, print the setting's line, and return whether all passed."""
    start = time.monotonic()
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow", *options]
    done = subprocess.run(
        [*command, *map(file_of, names)],
        cwd=TESTS.parent, env={**os.environ, **environ}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    lines = done.stdout.splitlines() or done.stderr.splitlines()[-5:] or [""]
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))] if done.returncode else []
    print("\n    ".join([f"{setting:32} {time.monotonic() - start:4.0f} s  {lines[-1]}", *failed]), flush=True)
    return done.returncode == 0


def run_beside_busy_loops() -> bool:
    """Run all tests that could differ on a busy machine, beside two processes that keep both cores busy."""
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2)]
    try:
        return run(BUSY, {}, [*NUMERIC.split(), *TIMED])
    finally:
        for loop in loops:
            loop.kill()


def main() -> None:
    """Run all settings, or those whose names contain one of the given words."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("words", nargs="*", help="run only settings whose names contain one of these")
    words = parser.parse_args().words
    for name in (*NUMERIC.split(), *TIMED):
        file_of(name)  # raises an error now, not after an hour, if a file has another name
    chosen = [name for name in SETTINGS if not words or any(word in name for word in words)]

    def one(name: str) -> bool:
        return run(name, SETTINGS[name], [*NUMERIC.split(), RUNS], "-k", FEW)

    with ThreadPoolExecutor(2) as pool:
        passed = list(pool.map(one, [name for name in chosen if name != ALONE]))
    passed += [one(name) for name in chosen if name == ALONE]
    if not words or any(word in BUSY for word in words):
        passed.append(run_beside_busy_loops())
    sys.exit(0 if passed and all(passed) else 1)


if __name__ == "__main__":
    main()
