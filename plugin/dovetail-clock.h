#ifndef DOVETAIL_CLOCK_H
#define DOVETAIL_CLOCK_H

/* How long something takes, whatever is done to the clock: an administrator, or a
   time server, may set that by hours. What is shown to people, or to other nodes,
   is the time of day (ioloop_time); what is waited for is this. */

/* Microseconds since some time before this process started. */
uint64_t dovetail_monotonic_usecs(void);

/* The same in seconds; never 0. */
static inline time_t dovetail_monotonic_secs(void)
{
	return dovetail_monotonic_usecs() / 1000000 + 1;
}

#endif
