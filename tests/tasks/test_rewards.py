from __future__ import annotations

import math
import pickle

import pytest

from jaxrl_post import tasks
from jaxrl_post.errors import InputError
from jaxrl_post.isolation import JudgePool
from jaxrl_post.tasks import from_reward_function
from jaxrl_post.tasks.rewards import TrainerState
from jaxrl_post.types import Completion, Prompts

SEEN: list[dict] = []


def matches(completions, answer, **kwargs):
    return [float(text == gold) for text, gold in zip(completions, answer, strict=True)]


def sees(prompts, completions, **columns):
    SEEN.append({"prompts": prompts, "completions": completions} | columns)
    return [1.0] * len(completions)


def strict_signature(completions, answer):
    return [0.5] * len(completions)


def says(completions, **kwargs):
    """The number that the completion is, None for a blank."""
    return [float(text) if text else None for text in completions]


async def eventually(completions, **kwargs):
    return [2.0] * len(completions)


def too_few(completions, **kwargs):
    return [1.0]


class Constant:
    def __init__(self, value: float) -> None:
        self.value = value

    def __call__(self, completions, **kwargs):
        return [self.value] * len(completions)


def make_prompts(count: int = 2) -> Prompts:
    messages = (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "How much?"},
    )
    columns = [{"answer": str(i), "level": 7 + i} for i in range(count)]
    columns[-1].pop("level")
    return Prompts(
        tuple(map(str, range(count))),
        (messages,) * count,
        tuple(columns),
        (None,) * count,
    )


def test_trls_signature():
    judge = from_reward_function(matches)
    verdicts = judge(make_prompts(), ["0", "0"])
    assert [(v.reward, v.success) for v in verdicts] == [(1.0, True), (0.0, False)]
    assert verdicts[0].extra == {"reward/matches": 1.0}


def test_what_a_function_is_called_with():
    SEEN.clear()
    from_reward_function(sees)(make_prompts(), ["a", "b"])
    from_reward_function(sees, conversational=True)(make_prompts(), ["a", "b"])
    logging = {SEEN[0].pop(name) for name in ("log_extra", "log_metric")}
    assert all(map(callable, logging))
    assert SEEN[0] == {
        "prompts": ["Be brief.\n\nHow much?"] * 2,
        "completions": ["a", "b"],
        "answer": ["0", "1"],
        "level": [7, None],
    }
    assert SEEN[1]["prompts"][0] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "How much?"},
    ]
    assert SEEN[1]["completions"] == [
        [{"role": "assistant", "content": "a"}],
        [{"role": "assistant", "content": "b"}],
    ]


def test_columns_that_a_function_does_not_name_are_left_out():
    judge = from_reward_function(strict_signature)
    assert judge(make_prompts(), ["a", "b"])[0].reward == 0.5


def test_zero_none_and_nan_are_three_things():
    judge = from_reward_function(says)
    zero, none = judge(make_prompts(), ["0", ""])
    assert (zero.reward, zero.success) == (0.0, False)
    assert (none.reward, none.success) == (None, None)
    with pytest.raises(ValueError, match="returned nan as a reward"):
        judge(make_prompts(1), ["nan"])
    with JudgePool(0) as pool:
        verdicts = pool.judge(judge, make_prompts(3), ["0", "", "nan"])
    assert [v.reward for v in verdicts] == [0.0, None, None]
    assert ["error" in v.extra for v in verdicts] == [False, False, True]


def test_weights_and_entries_without_a_reward():
    judge = from_reward_function(
        [says, matches], weights=[0.5, 2.0], success_threshold=2.5
    )
    verdicts = judge(make_prompts(3), ["0", "1", ""])
    # .5*0 + 2*1, .5*1 + 2*1, and for the blank the second function alone.
    assert [v.reward for v in verdicts] == [2.0, 2.5, 0.0]
    assert [v.success for v in verdicts] == [False, True, False]
    assert verdicts[2].extra == {"reward/says": None, "reward/matches": 0.0}
    only = from_reward_function([says, says])
    assert only(make_prompts(1), [""])[0].reward is None


def test_other_callables():
    assert from_reward_function(eventually)(make_prompts(1), ["x"])[0].reward == 2.0
    judge = from_reward_function(Constant(3.0))
    (verdict,) = judge(make_prompts(1), ["x"])
    assert verdict.extra == {"reward/Constant": 3.0}
    judge = from_reward_function("math:fsum")
    assert judge.functions == (math.fsum,)
    assert pickle.loads(pickle.dumps(judge)) == judge


def test_bad_input():
    with pytest.raises(ValueError, match="2 reward functions and 1 weights"):
        from_reward_function([says, says], weights=[1.0])
    with pytest.raises(ValueError, match="too_few returned 1 rewards for 2"):
        from_reward_function(too_few)(make_prompts(), ["a", "b"])


def unreadable(completions, **kwargs):
    return [float(text) for text in completions]


def no_list(completions, **kwargs):
    return None


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (says, None),
        (unreadable, None),  # the answer's fault
        (too_few, "too_few returned 1 rewards for 2 completions"),
        (no_list, "no_list returned None, no list of rewards"),
    ],
)
def test_a_rehearsal_finds_what_no_answer_excuses(function, words):
    judge = from_reward_function([matches, function])
    with JudgePool(0) as pool:
        (verdict,) = pool.judge(judge.rehearse, make_prompts(1), [""])
    wrong = verdict.extra["wrong"]
    assert wrong is None if words is None else words in wrong


# What TRL's functions may take beside columns -----------------------------------------


def log_things(completions, log_extra, log_metric):
    log_extra("first", [text[:1] for text in completions])
    log_metric("seen", len(completions))
    return [1.0 for _ in completions]


def test_what_a_function_logs_is_kept_with_the_verdicts():
    prompts = Prompts(("a", "b"), ((), ()), ({}, {}), (None, None))
    verdicts = from_reward_function(log_things)(prompts, ["xy", "z"])
    assert [v.extra["first"] for v in verdicts] == ["x", "z"]
    assert [v.extra["reward/seen"] for v in verdicts] == [2.0, 2.0]


def reads_tokens(completions, completion_ids, trainer_state):
    assert all(map(isinstance, completion_ids, [list] * len(completions)))
    done = trainer_state.global_step / trainer_state.max_steps
    return [done * len(ids) for ids in completion_ids]


def wants_epoch(completions, trainer_state):
    return [trainer_state.epoch for _ in completions]


def takes_anything(completions, **kwargs):
    SEEN.append(kwargs)
    return [1.0 for _ in completions]


def test_tokens_and_the_state_of_training_reach_who_asks_for_them():
    """Through the pool, as in a run: the worker gets both by pickle."""
    judge = from_reward_function(reads_tokens)
    judge.check(make_prompts())
    completions = [Completion("ab", [5, 6, 1]), Completion("", [1])]
    with JudgePool(1) as pool:
        verdicts = pool.judge(judge.at(TrainerState(1, 2)), make_prompts(), completions)
    assert [v.reward for v in verdicts] == [1.5, 0.5], verdicts
    SEEN.clear()
    anything = from_reward_function(takes_anything)
    anything.at(TrainerState(3, 4))(make_prompts(), completions)
    assert SEEN[0]["completion_ids"] == [[5, 6, 1], [1]]
    assert SEEN[0]["trainer_state"] == TrainerState(3, 4)


def test_who_does_not_ask_is_the_same_judge_at_any_time():
    judge = from_reward_function(strict_signature)
    assert judge.at(TrainerState(1, 2)) is judge
    assert not judge.takes("completion_ids")


def test_a_state_that_is_not_there_is_found_in_the_rehearsal():
    judge = from_reward_function(wants_epoch).at(TrainerState(0, 4))
    (verdict,) = judge.rehearse(make_prompts(1), [""])
    assert "trainer_state.epoch: here it has global_step" in verdict.extra["wrong"]
    assert getattr(TrainerState(0, 4), "epoch", None) is None


def test_async_functions_wait_at_the_same_time():
    """Each lets the other go on: one after the other they would wait for ever."""
    import asyncio

    turns = []

    def function(name, other):
        async def reward(completions, **kwargs):
            turns.append(name)
            while other not in turns:
                await asyncio.sleep(0)
            return [1.0 for _ in completions]

        return reward

    judge = from_reward_function([function("a", "b"), function("b", "a")])
    prompts = Prompts(("q",), ((),), ({},), (None,))
    assert judge(prompts, ["x"])[0].reward == 2.0


def wants_target(completions, target):
    return [0.0 for _ in completions]


def test_a_missing_column_is_an_error_when_the_task_is_opened(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "1+1", "targets": "2"}\n')
    options = {"source": str(path), "prompt": "question", "answer": None}
    with pytest.raises(InputError, match="wants 'target'.*did you mean 'targets'"):
        tasks.load("rows", reward=wants_target, **options)
