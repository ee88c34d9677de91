/* SPDX-License-Identifier: MIT */
#ifndef CRAB_ANSWER_H
#define CRAB_ANSWER_H

#include "batch.h"

/* Answers that a core makes in a second, of all kinds together: as many as Linux sends ICMP messages (icmp_msgs_per_sec). */
#define CRAB_ANSWERS 1000

/* Answer a frame that no service and no handler wants, if it is to a VIP's address.  Returns the counter of what became of it. */
enum crab_counter crab_batch_answer(const struct crab_batch *b, uint32_t place);

/* Refuse a SYN for which there is no backend.  Returns as above. */
enum crab_counter crab_answer_syn(struct crab_core *core, struct crab_frame *frame, const struct crab_packet *p, uint32_t now);

#endif
