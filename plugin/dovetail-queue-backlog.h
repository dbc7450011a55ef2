#ifndef DOVETAIL_QUEUE_BACKLOG_H
#define DOVETAIL_QUEUE_BACKLOG_H

/* The entries of one stream that not every replica has confirmed: how many,
   how large, how old. Kept as runs of neighbouring entries; while there are
   few, a run is one entry. When there are DOVETAIL_QUEUE_BACKLOG_RUNS of them,
   neighbours are joined, so memory stays bounded and only the exactness of
   sizes and ages inside a run is lost. */

#define DOVETAIL_QUEUE_BACKLOG_RUNS 8192

/* A stream ID: what an entry's generation and seq are to Redis. 0-0 is before
   every entry. */
struct dovetail_queue_id {
	uint64_t generation, seq;
};

static inline int
dovetail_queue_id_cmp(const struct dovetail_queue_id *a,
		      const struct dovetail_queue_id *b)
{
	if (a->generation != b->generation)
		return a->generation < b->generation ? -1 : 1;
	if (a->seq != b->seq)
		return a->seq < b->seq ? -1 : 1;
	return 0;
}

/* Parse "GENERATION-SEQ". Returns 0 or -1. */
int dovetail_queue_id_parse(const char *str, size_t len,
			    struct dovetail_queue_id *id_r);

struct dovetail_queue_backlog_sum {
	uint64_t entries, bytes;
	/* when the oldest of them was sealed; 0: there are none */
	uint64_t oldest_usecs;
};

struct dovetail_queue_backlog;

struct dovetail_queue_backlog *
dovetail_queue_backlog_init(unsigned int max_runs);
void dovetail_queue_backlog_deinit(struct dovetail_queue_backlog **backlog);
void dovetail_queue_backlog_clear(struct dovetail_queue_backlog *backlog);

/* Append the entries first..last, count of them, bytes together, the first of
   them sealed at time_usecs. IDs grow. */
void dovetail_queue_backlog_add(struct dovetail_queue_backlog *backlog,
				const struct dovetail_queue_id *first,
				const struct dovetail_queue_id *last,
				uint64_t count, uint64_t bytes,
				uint64_t time_usecs);
/* Everything up to id is confirmed by all: forget it. Returns the bytes this
   were. */
uint64_t dovetail_queue_backlog_confirm(struct dovetail_queue_backlog *backlog,
					const struct dovetail_queue_id *id);

/* All of it. */
void dovetail_queue_backlog_total(const struct dovetail_queue_backlog *backlog,
				  struct dovetail_queue_backlog_sum *sum_r);
/* What comes after id. */
void dovetail_queue_backlog_after(const struct dovetail_queue_backlog *backlog,
				  const struct dovetail_queue_id *id,
				  struct dovetail_queue_backlog_sum *sum_r);

#endif
