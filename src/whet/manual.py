"""What the commands say of themselves."""

HELP = """\
whet sharpens language models after pre-training.

  whet demo                                   watch a tiny model learn, from nothing, in minutes
  whet METHOD CONFIG.yaml [--section.key value] train a model; METHOD is one of
      sft                                     supervised fine-tuning on rows
      reward                                  a reward model, on pairs
      dpo simpo cpo cpo-simpo orpo apo        preference optimisation, on pairs
      kto bco                                 preference optimisation, on labelled completions
      gkd distill                             distillation from a teacher
      grpo dr-grpo dapo gspo cispo sapo rloo  reinforcement learning on prompts with a reward
      reinforce++ reinforce++-baseline remax  the same, with other ways of giving credit
      ppo                                     the same, with a critic
      opd                                     a teacher in place of a reward
  whet sample CONFIG.yaml [--then TRAIN.yaml] rejection sampling: the best of several answers become rows
  whet eval CONFIG.yaml [--section.key value] evaluate a model on held-out data
  whet chat MODEL                             talk to a model
  whet serve MODEL [--port 8000]              an OpenAI-compatible server on this machine
  whet merge ADAPTER OUTPUT                   add an adapter into plain weights
  whet convert SRC DST --to KIND              a model's weights into another kind of folder
  whet check CONFIG.yaml [--section.key value] find what is wrong with a run, and what it takes, before it begins
  whet plan CONFIG.yaml [--gpus 8xH100-80G]   what a run takes on machines that need not be there, and the best layout
  whet import TOOL FILE [-o OUT.yaml]         make a configuration of a file of trl, llamafactory or slime

A configuration is a YAML file; every setting is also a flag, and flags win:

  whet sft sft.yaml --model.path Qwen/Qwen3-0.6B --optim.lr 2e-5 --train.epochs 3

The smallest sft.yaml:                The smallest grpo.yaml:

  model: {path: my-model}               model: {path: my-model}
  data: {train: rows.jsonl}             data: {train: prompts.jsonl}
                                        reward: {use: math}

rows.jsonl holds {"prompt": …, "response": …} or {"messages": […]} per line, prompts.jsonl
{"prompt": …, "label": …}. All settings: docs/configuration.md. Names from TRL, LLaMA-Factory
and slime (--learning_rate, --n-samples-per-prompt, …) are understood as well.

With checkpoint.every_steps set, the same command goes on from the newest checkpoint in output_dir.
"""


SAMPLE_HELP = """\
whet sample CONFIG.yaml [--then TRAIN.yaml] [--section.key value …]

Answers every prompt of data.train rollout.group_size times, scores the answers by `reward`, and writes
what sample.select says (best, pairs, labels, all) to output_dir/rows.jsonl, with report.json and
scores.png beside it. The same command goes on where it was stopped or killed. With --then, TRAIN.yaml
is run on the rows.
"""


PLAN_HELP = """\
whet plan CONFIG.yaml [--gpus 8xH100-80G] [--nodes N] [--prompt-tokens N] [--response-tokens N] [--section.key value …]

Memory of a device by what takes it, seconds of a step and tokens per second, as the run is configured and for the
layout that is fastest of all that fit; where nothing fits, what to change, in order. Needs no GPU, no data and no
weights: of a model, a folder with config.json, or one of the names that are known. --gpus are those of one node; this
machine's when not given. Mean lengths are half of the longest unless they are given.

Ends with 0 if the run fits, as it is or laid out otherwise, and with 2 if it does not.
"""


CHECK_HELP = """\
whet check CONFIG.yaml [--section.key value …] [--rows N] [--plan [--gpus 8xH100-80G] [--nodes N]]

Everything that can be known before training, in one pass: settings that are wrong or do not go together, every row of
the data, the chat template and what of it is trained (the first N rows of each part are shown, 2 when not given), the
models' folders and vocabularies, and the memory that the run will take. Loads no weights.

With --plan the run is planned as well (see whet plan --help), with the lengths of its data.

Ends with 0 if training may begin, warnings or not, and with 2 if there is an error. The same is checked at the start of
every training command.
"""


EVAL_HELP = """\
whet eval CONFIG.yaml [--section.key value …]

Evaluates model.path on data.eval: the losses of sft, or with `method: grpo` the reward of sampled
completions, on data.eval and all of eval.sets at once. Prints one metric per line, then a few completions.
"""
