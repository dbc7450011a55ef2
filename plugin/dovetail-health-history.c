/* Copyright (c) 2026 dovetail authors, LGPL-2.1-or-later, see COPYING */

/* The last hour, for the plot: how far everything was behind, and the node's state. As
   JSON:

     {"step": 10, "samples": 360, "states": [null, 0, ...],
      "peers": [{"peer": "b", "to": [null, 0.012, ...], "from": [...]}]}

   The last sample is the present, and one is the worst of "step" seconds; lags are
   in seconds, states in the order of enum dovetail_health_state; null: not known. */

#include "lib.h"
#include "array.h"
#include "hash.h"
#include "str.h"
#include "dovetail-health-private.h"
#include "dovetail-service.h"

#define HISTORY_STEP_SECS 10
#define HISTORY_SAMPLES 360

/* Milliseconds, or a state. */
#define SAMPLE_UNKNOWN UINT32_MAX
struct ring {
	uint32_t samples[HISTORY_SAMPLES];
};

static struct {
	/* which step it is, since some time before the start */
	uint64_t step;
	struct ring states;
	/* two for each peer: to, from */
	struct ring *lags;
} history;

static void ring_clear(struct ring *ring)
{
	/* all SAMPLE_UNKNOWN */
	memset(ring->samples, 0xff, sizeof(ring->samples));
}

static void ring_put(struct ring *ring, uint64_t value)
{
	uint32_t *sample = &ring->samples[history.step % HISTORY_SAMPLES];

	if (value >= SAMPLE_UNKNOWN && value != DOVETAIL_HEALTH_NEVER)
		value = SAMPLE_UNKNOWN - 1;
	if (value != DOVETAIL_HEALTH_NEVER &&
	    (*sample == SAMPLE_UNKNOWN || *sample < value))
		*sample = value;
}

static void history_step(uint64_t step)
{
	unsigned int i, count = array_count(&health.peers) * 2;

	if (step - history.step > HISTORY_SAMPLES)
		history.step = step - HISTORY_SAMPLES;
	while (history.step < step) {
		uint64_t next = ++history.step % HISTORY_SAMPLES;

		history.states.samples[next] = SAMPLE_UNKNOWN;
		for (i = 0; i < count; i++)
			history.lags[i].samples[next] = SAMPLE_UNKNOWN;
	}
}

void health_history_update(void)
{
	struct health_peer *peer;
	const char *about;
	unsigned int i = 0;

	history_step(dovetail_monotonic_msecs() / 1000 / HISTORY_STEP_SECS);
	ring_put(&history.states, health_state_worst(FALSE, &about)->state);
	array_foreach_elem(&health.peers, peer) {
		ring_put(&history.lags[i++],
			 health_state_primary_lag(peer->name));
		ring_put(&history.lags[i++],
			 health_state_replica_lag(peer->name));
	}
}

static void
ring_json(string_t *dest, const char *key, const struct ring *ring, bool msecs)
{
	unsigned int i;
	uint32_t value;

	str_printfa(dest, "\"%s\":[", key);
	for (i = 1; i <= HISTORY_SAMPLES; i++) {
		value = ring->samples[(history.step + i) % HISTORY_SAMPLES];
		if (i > 1)
			str_append_c(dest, ',');
		if (value == SAMPLE_UNKNOWN)
			str_append(dest, "null");
		else if (!msecs || value == 0)
			str_printfa(dest, "%u", value);
		else
			str_printfa(dest, "%u.%03u", value / 1000, value % 1000);
	}
	str_append_c(dest, ']');
}

void health_history_json(string_t *dest)
{
	struct health_peer *peer;
	unsigned int i = 0;

	str_printfa(dest, "{\"step\":%u,\"samples\":%u,", HISTORY_STEP_SECS,
		    HISTORY_SAMPLES);
	ring_json(dest, "states", &history.states, FALSE);
	str_append(dest, ",\"peers\":[");
	array_foreach_elem(&health.peers, peer) {
		str_append(dest, i == 0 ? "{" : ",{");
		health_json_str(dest, "peer", peer->name);
		str_append_c(dest, ',');
		ring_json(dest, "to", &history.lags[i++], TRUE);
		str_append_c(dest, ',');
		ring_json(dest, "from", &history.lags[i++], TRUE);
		str_append_c(dest, '}');
	}
	str_append(dest, "]}\n");
}

void health_history_init(void)
{
	unsigned int i, count = array_count(&health.peers) * 2;

	history.step = dovetail_monotonic_msecs() / 1000 / HISTORY_STEP_SECS;
	ring_clear(&history.states);
	history.lags = i_new(struct ring, count + 1);
	for (i = 0; i < count; i++)
		ring_clear(&history.lags[i]);
}

void health_history_deinit(void)
{
	i_free(history.lags);
}
