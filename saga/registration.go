package saga

import (
	"context"
	"fmt"

	jsonv1 "github.com/go-json-experiment/json/v1"

	"github.com/deed-go/deed/eventstore"
)

func encodeRegistration(from eventstore.Position) ([]byte, error) {
	return jsonv1.Marshal(registration{Format: historyFormat, From: from})
}

func decodeRegistration(r *eventstore.Recorded) (eventstore.Position, error) {
	var reg registration
	if err := jsonv1.Unmarshal(r.Data, &reg); err != nil {
		return 0, &eventstore.DecodeError{Event: *r, Cause: err}
	}
	if reg.Format > historyFormat {
		return 0, fmt.Errorf("%w: its registration has format %d, this program knows up to %d", errNewerHistory, reg.Format, historyFormat)
	}
	return reg.From, nil
}

func registrationOf(worker string) eventstore.Stream {
	return eventstore.Stream{Category: registrationStream, ID: worker}
}

// registered returns where the log says that the worker begins; false if it
// does not say.
func registered(ctx context.Context, store eventstore.Store, worker string) (eventstore.Position, bool, error) {
	for r, err := range store.Read(ctx, eventstore.OneStream(registrationOf(worker)), eventstore.ReadOptions{Limit: 1}) {
		if err != nil {
			return 0, false, err
		}
		from, err := decodeRegistration(&r)
		return from, err == nil, err
	}
	return 0, false, nil
}
