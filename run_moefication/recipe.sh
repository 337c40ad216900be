# shellcheck shell=bash
# Sourced by the numbered scripts: the settings that belong together. Each can be given in the environment instead.
#
#     RECIPE=calibrated    many small experts split on activations, some of them shared; ridge gates; a threshold instead
#                          of a fixed number; stage 5 refits what remains (the default, and the better model)
#     RECIPE=plain         the original description's: 8 experts clustered on weights, MLP gates, 2 of 8 for every token

# shellcheck source=run_moefication/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
whole 1 NUM_EXPERTS NUM_SELECTS
whole 0 NUM_SHARED_EXPERTS
RECIPE="${RECIPE:-calibrated}"
case "$RECIPE" in
    calibrated)
        NUM_EXPERTS="${NUM_EXPERTS:-256}"                          # must divide the MLP's width
        NUM_SELECTS="${NUM_SELECTS:-$((NUM_EXPERTS / 2))}"         # experts per token, shared ones included
        # Of these, always on: an eighth of all, at small budgets a sixteenth, at the smallest half of the budget.
        NUM_SHARED_EXPERTS="${NUM_SHARED_EXPERTS:-$((NUM_SELECTS * 5 > NUM_EXPERTS * 2 ? NUM_EXPERTS / 8 :
            NUM_SELECTS * 8 > NUM_EXPERTS ? NUM_EXPERTS / 16 : NUM_SELECTS / 2))}"
        CLUSTER_ON="${CLUSTER_ON:-activations}"
        SELECT_CRITERION="${SELECT_CRITERION:-output_norm}"
        GATE_NETWORK="${GATE_NETWORK:-linear}"
        GATE_RANK="${GATE_RANK-$([ "$NUM_EXPERTS" -lt 256 ] || echo 64)}" # two factors of a large gate; empty: full
        OUTPUT_BIAS="${OUTPUT_BIAS-1}"                             # empty: none, for architectures without one
        ROUTING="${ROUTING:-threshold}"
        ;;
    plain)
        NUM_EXPERTS="${NUM_EXPERTS:-8}"
        NUM_SHARED_EXPERTS="${NUM_SHARED_EXPERTS:-0}"
        NUM_SELECTS="${NUM_SELECTS:-2}"
        CLUSTER_ON="${CLUSTER_ON:-weights}"
        SELECT_CRITERION="${SELECT_CRITERION:-l2_norm}"            # plain, positive, l2_norm or output_norm
        GATE_NETWORK="${GATE_NETWORK:-mlp}"                        # mlp, linear or similarity
        GATE_RANK="${GATE_RANK:-}"
        OUTPUT_BIAS="${OUTPUT_BIAS:-}"
        ROUTING="${ROUTING:-top_k}"
        ;;
    *)
        echo "error: RECIPE=$RECIPE: calibrated or plain" >&2
        exit 2
        ;;
esac
if [ "$NUM_SELECTS" -lt 1 ] || [ "$NUM_SELECTS" -gt "$NUM_EXPERTS" ]; then
    echo "error: NUM_SELECTS=$NUM_SELECTS is outside of 1 to NUM_EXPERTS=$NUM_EXPERTS" >&2
    exit 2
fi
